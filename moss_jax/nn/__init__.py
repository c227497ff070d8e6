"""Building blocks that the models share: layers with logical axis names, attention, convolution, quantisation."""
