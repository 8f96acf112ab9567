<<<<<<< HEAD
"""What a hub serves to browsers: the JavaScript client and the live page, as they are."""
=======
"""The JavaScript client and the live page, and what serves their files."""
>>>>>>> df0e96234e5a7b40d9cde91594b68635f3a1497c
