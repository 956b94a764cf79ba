"""Everything about the package is in pyproject.toml; this file is where the extension's build is hooked in."""

from setuptools import setup

setup()
