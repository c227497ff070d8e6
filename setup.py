from setuptools import setup  # all settings are in pyproject.toml

setup()
