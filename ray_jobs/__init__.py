"""The program: captioner's flow on Ray, one file for each job."""
