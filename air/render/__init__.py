"""Rendering: Gaussians -> image, differentiable, one file per backend.

    from air.render import render
    image = render(gaussians, height, width)

`air.render` is also the name of that function for users of the package, so this module can be called.
"""
