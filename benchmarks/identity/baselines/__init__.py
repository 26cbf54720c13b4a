"""What other papers do with a photo, on our base: one file a method, one line in the registry."""
