"""How far this grows: costs that are measured here, and a simulation of what no machine here can run."""
