"""The models of an application in their lives: which are loaded, asleep or wanted, and who gives way to whom."""
