"""The application: what the command line runs. Every module imports what is heavy inside its functions."""
