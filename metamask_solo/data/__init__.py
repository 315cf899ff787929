"""Images: data sets made from packages, transforms, loaders and the checks of image folders."""
