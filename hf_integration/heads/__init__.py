"""Draft heads as modules: what a head computes, whatever format its weights came in."""
