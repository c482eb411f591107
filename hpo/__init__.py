"""What a person runs: studies, fronts, plots and the `hpo` command."""
