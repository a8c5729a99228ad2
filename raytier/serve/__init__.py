"""The Ray Serve front. `raytier.serve:build_app` is what `serve run` imports."""

from raytier.serve.app import build_app

__all__ = ["build_app"]
