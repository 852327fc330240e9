"""An OpenAI-compatible server over the scheduler. app.py is the file to read first."""
