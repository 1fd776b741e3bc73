"""Installation. ``pip install -c constraints.txt .`` gives the versions that were tested."""

from setuptools import find_packages, setup

setup(
    name="r1_megatron",
    version="0.1.0",
    description="The DeepSeek-R1 recipe for large mixture-of-experts models on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["r1_megatron", "r1_megatron.*"]),
    install_requires=[
        "torch>=2.11",
        "megatron-core==0.16.1",
        "einops",
        "psutil",
        "numpy",
        "pyyaml",
        "sentencepiece",
        "tokenizers",
        "jinja2",
        "math-verify[antlr4_13_2]",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12", "nvidia-ml-py"],
        "dev": ["pytest", "ruff", "pyright", "transformers>=5.0", "scipy"],
        "track": ["wandb"],
    },
    entry_points={"console_scripts": ["r1-megatron = r1_megatron.cli:main"]},
)
