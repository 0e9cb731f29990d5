"""How processes of a run start and end. Imports no torch but where torchrun is started."""
