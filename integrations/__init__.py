"""Adapters between stepping_plugin and other libraries, one folder per library.

Installed and imported as ``stepping_plugin.integrations``; never import the folder as ``integrations``.
The core calls the adapters through small interfaces; nothing is imported here, so each library loads on use.
"""
