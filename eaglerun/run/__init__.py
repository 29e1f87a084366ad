"""One rank: the models, their memory, and the steps on the device."""
