"""Draft heads as published: which format a checkpoint has, and one reader a format."""
