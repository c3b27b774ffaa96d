"""What takes several nodes: do they agree, and can each pair of them write to each other?"""
