"""What a model wrote, taken apart: thoughts, text, calls of tools. Pure; nothing here knows of HTTP or of engines."""
