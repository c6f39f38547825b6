"""Stage control, which finds the patches that are still bad, and the loop that predicts and optimises in stages. They
know nothing of files or training.
"""
