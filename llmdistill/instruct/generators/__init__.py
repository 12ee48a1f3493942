"""Generators make tasks.  Each call of a generator is a short exchange with the teacher that
returns tasks.

All random choices are drawn from the seed and the number of the call, so a call that is repeated
sends the same requests.
"""
