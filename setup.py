"""All metadata is in pyproject.toml; this file lets tools that ask for a setup.py install the package."""

from setuptools import setup

setup()
