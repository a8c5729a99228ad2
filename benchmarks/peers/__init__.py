"""The systems that raytier is compared with, each in an environment of its own (`install.py`) and a process of its own.

`side` starts and steers the processes, `protocol` is what they speak, `memory_limit` is the cgroup around one of them;
`run_*.py` are the programs inside, one per system, run by the Python of its environment.
"""
