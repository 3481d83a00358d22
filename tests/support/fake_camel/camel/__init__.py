"""The part of CAMEL's interface that `coterie.inference.camel` uses, for tests where camel-ai is not installed."""
