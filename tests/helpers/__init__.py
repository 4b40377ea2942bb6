"""What tests share: import it as `from helpers.small import small_config`."""
