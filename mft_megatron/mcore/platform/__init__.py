"""This machine: devices, releases, optional packages, number formats, mixed products, patches of other packages."""
