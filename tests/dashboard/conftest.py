import sys
from pathlib import Path

# Test modules here share helpers; importlib mode puts no folder on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))
