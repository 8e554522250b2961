"""Speculative decoding: tokens are guessed, the model checks several of them in one step.

Sampling is what it is without guesses: the token at each place is drawn from the same logits with the same random
numbers, and a guess is kept if it is that token. So outputs do not change, whatever their sampling parameters are.
"""
