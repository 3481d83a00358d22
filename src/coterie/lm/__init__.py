"""The base model and its adapters: loading, the adapter bank, prefix trees and the attention over them.

Shared by the in-process engine and the learner, which is why publishing an adapter costs nothing.
"""
