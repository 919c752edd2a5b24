"""Releases on a device: installed beside one another, switched in one step, tried before they stay.

This package runs before anything else of a release is there, so it imports the standard library only, and
broker_config.files, which does too. (Only checking a
signature needs `cryptography`, which the release in use has brought.)

/opt/kvbus
    store/SHA256/        layers, unpacked: the packages, the agent, the model; releases share them
    releases/NAME/       release.json and its signature, agent.toml, password, links to its layers
    current, previous    links into releases/; current is what the service runs
    trial.json           while a release is on trial; a restart of the device ends the trial with a way back
    site.pub             the key by which releases of this site are signed, taken from the first one
    installer.pyz        this package
"""
