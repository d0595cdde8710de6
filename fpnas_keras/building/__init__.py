"""The whole way from images to the file for the app: its settings, its plan and its steps.

fpnas build --data=folder:photos --target=8M --time=1h --output_dir=runs/photos
"""
