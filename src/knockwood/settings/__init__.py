"""knockwood.toml: its schema, its loading, its errors with file and line."""
