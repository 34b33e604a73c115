"""Files that survive kills and damage, and the locks of those who write them."""
