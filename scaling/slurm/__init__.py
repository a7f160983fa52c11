"""A sweep on SLURM: runs packed into jobs, jobs written and submitted by submitit, followed by their files and squeue."""
