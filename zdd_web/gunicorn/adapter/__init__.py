"""What changes gunicorn's own classes in a worker: a module for each of them.

Each replaces methods of one worker object, or of a class in one worker's process, and says which lines of gunicorn make
that necessary. Line references are to 27.0.1.
"""
