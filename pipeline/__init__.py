"""The system around the method, stage by stage; see README.md in this folder."""
