"""The one thing that pyproject.toml cannot say: two top-level folders are subpackages once installed.

Packages are found, not listed, so a new folder with an ``__init__.py`` ships without a change here.
Everything else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["stepping_plugin", "stepping_plugin.*"])
package_dir = {}
for folder in ("integrations", "recipes"):
    if Path(folder).is_dir():
        name = f"stepping_plugin.{folder}"
        package_dir[name] = folder
        packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=package_dir)
