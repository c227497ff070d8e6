"""Evaluations of a system: likelihoods, multiple choice, spoken questions, resynthesis, similarity of layers."""
