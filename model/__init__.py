"""The network: length configs, the length-adaptive encoder, its training and its evaluation."""
