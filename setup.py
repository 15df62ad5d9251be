"""The packages of the wheel: cli/ and calib_sets/ lie beside the library, and install inside of it.

All else stands in pyproject.toml, whose search for packages sees folders of the package alone.
"""

from setuptools import find_packages, setup

BESIDE = {"nirvana_deploy.calib_sets": "calib_sets", "nirvana_deploy.cli": "cli"}

setup(
    packages=[*find_packages(include=["nirvana_deploy", "nirvana_deploy.*"]), *BESIDE],
    package_dir={"nirvana_deploy": "nirvana_deploy", **BESIDE},
)
