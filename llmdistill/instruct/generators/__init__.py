"""How tasks are made.  A generator is asked for call after call; each call is a short exchange with
the teacher that ends with tasks.

Everything random is drawn from the seed and the number of the call, so a call that is made again
asks the same.
"""
