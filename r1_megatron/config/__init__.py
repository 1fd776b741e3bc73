"""Configuration: schema, YAML loading, validation, presets. No torch in this room."""
