"""Where images come from: names, folders and objects, read as columns of images and labels."""
