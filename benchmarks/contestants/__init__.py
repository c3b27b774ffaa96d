"""What is measured: this package, its peers and the floors, all behind one interface."""
