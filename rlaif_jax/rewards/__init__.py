"""Pure `jnp` functions that turn feedback arrays into rewards."""
