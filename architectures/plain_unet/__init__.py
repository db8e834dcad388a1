"""The convolutional U-Net that nnU-Net plans for 2-D images: the baseline, trainable in its own right."""
