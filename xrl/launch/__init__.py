"""How processes of a run start and end. Imports no torch."""
