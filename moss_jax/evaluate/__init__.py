"""How good a model is: likelihoods, multiple choice, spoken questions, resynthesis, similarity of layers."""
