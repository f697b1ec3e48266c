"""Map the top-level folders envs/, agents/, planners/ to clbench.envs, clbench.agents, clbench.planners.

The rest of the metadata is in pyproject.toml. The tracked links clbench/envs -> ../envs (and so on) show the same tree to
static tools; this mapping is what pip uses, so sub-packages are found by themselves and zip installs work without links.
"""

from setuptools import find_packages, setup

FOLDERS = {"clbench.envs": "envs", "clbench.agents": "agents", "clbench.planners": "planners"}

core = [p for p in find_packages(include=["clbench", "clbench.*"]) if not p.startswith(tuple(FOLDERS))]
mapped = [f"{name}.{sub}".rstrip(".") for name, folder in FOLDERS.items() for sub in ["", *find_packages(folder)]]

setup(
    packages=core + mapped,
    package_dir=dict(FOLDERS),
    package_data={"": ["py.typed", "*.json", "*.html", "*.css"]},
)
