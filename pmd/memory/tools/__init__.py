"""What people do with a memory store: check it, compare generations, move it, look at it."""
