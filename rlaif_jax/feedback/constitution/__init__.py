"""Constitutions: principles, rules and formulas in one TOML file, and what they give as feedback."""
