"""Metadata lives in pyproject.toml; this file is the place where the C++ and CUDA extension is added to a build."""

from setuptools import setup

setup()
