"""What is searched: one TOML file per study, and the loader that checks them."""
